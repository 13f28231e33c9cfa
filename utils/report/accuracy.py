"""What test.py measured, as text for people and as a document for machines."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from utils.detection.average_precision import Metrics
from utils.report.cost import Cost
from utils.report.tables import Cell, Column, text_table

ACCURACY_COLUMNS = ("Class", "Images", "Objects", "P", "R", "F1", "AP50", "AP50-95")
BENCHMARK_COLUMNS = (
    Column("Input"),
    Column("NMS", ".2f"),
    *(Column(title) for title in ("P", "R", "F1", "AP50", "AP50-95", "GMACs")),
    *(Column(title, ".1f") for title in ("pre ms", "net ms", "nms ms")),
)


def accuracy_table(metrics: Metrics, *, per_class: bool = False) -> str:
    """A row for all classes, one a class if asked for, and one for each size of objects that occurs.

    P, R and F1 are those at IoU 0.5 and the confidence `metrics.confidence`; a size has none.
    """
    m = metrics
    rows: list[tuple[Cell, ...]] = [("all", m.images, m.objects, m.precision, m.recall, m.f1, m.map50, m.map50_95)]
    if per_class:
        rows += [(c.name, c.images, c.objects, c.precision, c.recall, c.f1, c.ap50, c.ap50_95) for c in m.per_class]
    rows += [
        (size.name, None, size.objects, None, None, None, size.ap50, size.ap50_95) for size in m.by_size if size.objects
    ]
    return text_table(ACCURACY_COLUMNS, rows)


def accuracy_document(metrics: Metrics) -> dict[str, Any]:
    """The same as JSON values; all but counts are fractions, 0..1, and only classes with objects are listed."""
    means = ("images", "objects", "map50", "map50_95", "precision", "recall", "f1", "confidence")
    of_class = ("name", "images", "objects", "ap50", "ap50_95", "precision", "recall", "f1")
    of_size = ("name", "objects", "ap50", "ap50_95")
    return {
        **{key: getattr(metrics, key) for key in means},
        "per_class": [{"class": c.index, **{key: getattr(c, key) for key in of_class}} for c in metrics.per_class],
        "by_size": [{key: getattr(size, key) for key in of_size} for size in metrics.by_size],
    }


def measurement_document(
    metrics: Metrics, ms: Mapping[str, float], cost: Cost, size: tuple[int, int], iou_thres: float
) -> dict[str, Any]:
    """One measurement of test.py as JSON values; `ms`: a time for each stage; `size`: height and width."""
    return {
        **accuracy_document(metrics),
        "parameters": cost.parameters,
        "macs": cost.macs,
        "ms": dict(ms),
        "size": list(size),
        "iou_thres": iou_thres,
    }


def measurement_text(document: Mapping[str, Any], metrics: Metrics, *, per_class: bool = False) -> str:
    """One measurement of test.py for people: the network, the table, the times; `document` is that of --json."""
    height, width = document["size"]
    ms = document["ms"]
    parameters = f"{document['parameters']:,}".replace(",", " ")
    return "\n".join(
        [
            f"{document['weights']}: {parameters} parameters, {document['macs'] / 1e9:.3f} GMACs at {height} × {width}",
            accuracy_table(metrics, per_class=per_class),
            f"P, R, F1 at IoU 0.5 and confidence {metrics.confidence:.3f}, where the mean F1 is highest",
            f"ms an image: {ms['preprocess']:.1f} pre-process, {ms['inference']:.1f} inference, {ms['nms']:.1f} NMS; "
            f"{height} × {width}, batch {document['batch_size']}, {document['runtime']}",
        ]
    )


def benchmark_text(document: Mapping[str, Any]) -> str:
    """The measurements of `test.py --task benchmark` for people, from the document of --json: one a row."""
    rows = [
        (
            "{} × {}".format(*row["size"]),
            row["iou_thres"],
            *(row[key] for key in ("precision", "recall", "f1", "map50", "map50_95")),
            row["macs"] / 1e9,
            *(row["ms"][key] for key in ("preprocess", "inference", "nms")),
        )
        for row in document["benchmark"]
    ]
    title = f"{document['weights']}: ms an image, batch {document['batch_size']}, {document['runtime']}"
    return f"{title}\n{text_table(BENCHMARK_COLUMNS, rows)}"
