"""The light halves of the stand-ins. ``auto`` never takes them: golden ops, only slower."""

from __future__ import annotations

from refengine.backend.info import BackendInfo

LOOPBACK = BackendInfo(
    description="the golden ops behind the plainest possible backend, to check the contract itself",
    install="pip install 'refengine[conformance]'",
    probe=lambda: None,
    priority=-1,
)

DEVICE_STRICT = BackendInfo(
    description="an accelerator played by the CPU, to find code that would fail on a real one",
    install="pip install 'refengine[conformance]'",
    probe=lambda: None,
    priority=-2,
)
