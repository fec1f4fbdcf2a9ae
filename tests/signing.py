"""Bundles that a test has changed, with a manifest that fits: what is refused then is not refused for a hash."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any


def sign(bundle: Path, change: Callable[[dict[str, Any]], object] = lambda manifest: None) -> Path:
    """Give the manifest the sizes and hashes that the files have now, then change it."""
    path = bundle / "manifest.json"
    manifest = json.loads(path.read_text("utf-8"))
    for entry in manifest["files"]:
        data = (bundle / entry["path"]).read_bytes()
        entry |= {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    change(manifest)
    path.write_text(json.dumps(manifest), "utf-8")
    return bundle
