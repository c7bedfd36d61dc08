"""A checkpoint's tensors as one hash, from the bytes of its files alone."""

import hashlib
import json
from pathlib import Path


def hash_tensors(folder):
    """sha256 (hex) over name, dtype, shape and bytes of every tensor in the folder, in name order."""
    tensors = {}
    for path in Path(folder).glob("*.safetensors"):
        raw = path.read_bytes()
        start = 8 + int.from_bytes(raw[:8], "little")
        for name, entry in json.loads(raw[8:start]).items():
            if name != "__metadata__":
                first, end = entry["data_offsets"]
                head = f"{name} {entry['dtype']} {entry['shape']}\n".encode()
                tensors[name] = head + raw[start + first : start + end]
    return hashlib.sha256(b"".join(tensors[name] for name in sorted(tensors))).hexdigest()
