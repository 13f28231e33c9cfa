"""ncnn files of export.py: NAME.param, its weights in NAME.bin, and what they are in NAME.json. No torch."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from utils.errors import WeightsError
from utils.files import read_text, regular_file
from utils.runtime.exported import DIGEST, ExportedFile, sha256
from utils.runtime.metadata import Metadata, read_metadata

TEXT = "cfg"
"""The property that is no JSON."""
HASHED = (".param", ".bin")
"""Files whose digests are in the third."""


def description(metadata: Metadata, param: bytes, weights: bytes) -> str:
    """Text of NAME.json: the metadata as one document, with the sha256 of the other two files."""
    properties = {key: text if key == TEXT else json.loads(text) for key, text in metadata.properties().items()}
    digests = {suffix: hashlib.sha256(data).hexdigest() for suffix, data in zip(HASHED, (param, weights), strict=True)}
    return json.dumps({**properties, DIGEST: digests}, ensure_ascii=False, indent=1) + "\n"


def read_ncnn(path: Path) -> ExportedFile:
    """Read what NAME.json says, and compare NAME.param and NAME.bin with it: ncnn itself does not notice damage.

    Raises:
        WeightsError: a file is missing, damaged, or another than was written.
    """
    regular_file(path, WeightsError)
    beside = path.with_suffix(".json")
    if not beside.exists():
        raise WeightsError(f"{beside}: no such file, and it says what {path.name} is: export.py --format ncnn writes "
                           "three files that belong together")  # fmt: skip
    try:
        document = json.loads(read_text(beside, WeightsError))
        digests = {suffix: document[DIGEST][suffix] for suffix in HASHED}
        properties = {key: value if key == TEXT else json.dumps(value) for key, value in document.items()}
    except WeightsError:
        raise
    except (AttributeError, KeyError, TypeError, ValueError, RecursionError) as failure:
        raise WeightsError(f"{beside}: damaged ({type(failure).__name__}: {failure}); export again") from None
    for suffix, digest in digests.items():
        if sha256(file := path.with_suffix(suffix)) != digest:
            raise WeightsError(f"{file}: is not as export.py wrote it: changed, or damaged; export again")
    metadata = read_metadata(properties, str(beside))
    if metadata.output != "heads":
        raise WeightsError(f"{beside}: its metadata are damaged: ncnn files put out raw heads")
    return ExportedFile(path, metadata, 1)
