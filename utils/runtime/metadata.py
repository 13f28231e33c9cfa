"""What a file for other runtimes says of itself, so that nothing else is needed to use it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from utils.darknet import cfg as cfg_file
from utils.darknet.blocks import Network
from utils.darknet.network import strides
from utils.errors import CfgError, WeightsError
from utils.flags import MODES
from utils.quantization.scheme import QuantSettings
from utils.runtime.reference import Reference, read_reference

PRODUCER = "darknet-compression"
SCHEMA = 1
NARROW_BITS = 7
"""Weights of more bits can make two products with 8-bit activations overflow 16 bits."""
IMAGE = "images"
"""Name of the input: [B, C, H, W], float32 0…1, RGB (or grey where the network has one channel)."""
OUTPUTS = {
    "heads": "raw heads head0, head1, …: [B, A · (5 + C), H, W]",
    "rows": "rows [B, N, 5 + C]: cx, cy, w, h in pixels of the input, objectness, class probabilities",
    "detections": "detections [K, 7]: picture, x1, y1, x2, y2 in pixels of the input, confidence, class; best first",
}


@dataclass(frozen=True)
class Metadata:
    """The metadata of one file."""

    network: Network
    """As it was trained; `net` has the height and width of the file's input."""
    names: tuple[str, ...]
    """Of the classes."""
    output: str = "heads"
    """A key of OUTPUTS."""
    mode: str = "letterbox"
    """How pictures are fitted to the input: a key of `flags.MODES`."""
    precision: str = "float32"
    """Of weights and feature maps: float32, float16 or int8; input and outputs are always float32."""
    conf_thres: float = 0.3
    iou_thres: float = 0.6
    """Those of `--nms`; of other files a proposal."""
    lineage: tuple[Mapping[str, Any], ...] = ()
    """What the file was made from, oldest first."""
    quantization: Mapping[str, Any] | None = None
    """How an int8 network was quantized, as `QuantSettings.document` writes it."""
    reference: Reference | None = None
    """Outputs that runtimes are compared with; None in files of versions before."""

    @property
    def wide(self) -> bool:
        """Whether weights have so many bits that pairs of products may need more than 16."""
        if self.quantization is None:
            return False
        settings = QuantSettings(**self.quantization)
        return max(settings.weight_bits, settings.kernels.weight_bits) > NARROW_BITS

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the input."""
        return self.network.net.height, self.network.net.width

    @property
    def tensors(self) -> tuple[str, ...]:
        """Names of the outputs."""
        heads = tuple(f"head{number}" for number in range(len(self.network.heads)))
        return heads if self.output == "heads" else (self.output,)

    def properties(self) -> dict[str, str]:
        """As texts by name, for the file."""
        net, network = self.network.net, self.network
        heads = [
            {"stride": stride, "anchors": yolo.head_anchors, "classes": yolo.classes, "scale_x_y": yolo.scale_x_y,
             "new_coords": yolo.new_coords}
            for stride, yolo in zip(strides(network), network.yolos, strict=True)
        ]  # fmt: skip
        picture = {"height": net.height, "width": net.width, "channels": net.channels, "range": [0, 1],
                   "colours": "grey" if net.channels == 1 else "RGB", "fit": self.mode}  # fmt: skip
        documents = {
            "schema": SCHEMA,
            "names": self.names,
            "input": picture,
            "output": {"kind": self.output, "what": OUTPUTS[self.output]},
            "heads": heads,
            "thresholds": {"conf": self.conf_thres, "iou": self.iou_thres},
            "precision": self.precision,
            "lineage": [dict(entry) for entry in self.lineage],
            "quantization": self.quantization and dict(self.quantization),
            "reference": self.reference and self.reference.document(),
        }
        return {"cfg": cfg_file.format_network(network)} | {
            name: json.dumps(document, ensure_ascii=False) for name, document in documents.items()
        }


def read_metadata(properties: Mapping[str, str], path: str) -> Metadata:
    """The metadata of a file.

    Raises:
        WeightsError: there are none of this suite, or they contradict themselves.
    """
    if "cfg" not in properties or "schema" not in properties:
        raise WeightsError(f"{path}: says neither its network nor its classes: another program made it; "
                           "files of export.py can be used here")  # fmt: skip
    try:
        if json.loads(properties["schema"]) != SCHEMA:
            raise WeightsError(f"{path}: its metadata are of version {properties['schema']}, and {SCHEMA} can be read")
        network = cfg_file.parse(properties["cfg"], f"{path}!cfg")
        picture, thresholds = json.loads(properties["input"]), json.loads(properties["thresholds"])
        found = Metadata(
            network,
            tuple(map(str, json.loads(properties["names"]))),
            json.loads(properties["output"])["kind"],
            picture["fit"],
            json.loads(properties["precision"]),
            float(thresholds["conf"]),
            float(thresholds["iou"]),
            tuple(map(dict, json.loads(properties["lineage"]))),
            _quantization(properties.get("quantization", "null")),
            read_reference(json.loads(properties.get("reference", "null"))),
        )
    except CfgError:
        raise
    except WeightsError:
        raise
    except (KeyError, TypeError, ValueError, RecursionError) as failure:
        raise WeightsError(f"{path}: its metadata are damaged ({type(failure).__name__}: {failure})") from None
    if len(found.names) != network.classes or found.output not in OUTPUTS or found.mode not in MODES:
        raise WeightsError(f"{path}: its metadata are damaged: {len(found.names)} names for {network.classes} classes, "
                           f"output {found.output!r}, fit {found.mode!r}")  # fmt: skip
    return found


def _quantization(text: str) -> Mapping[str, Any] | None:
    found = json.loads(text)
    return None if found is None else QuantSettings(**{**found, "kept": tuple(found["kept"])}).document()
