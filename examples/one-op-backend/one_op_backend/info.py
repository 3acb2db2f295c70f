"""The light half, read by `refengine backends`: imports nothing heavy."""

from refengine.backend.info import BackendInfo

INFO = BackendInfo(
    description="RMS normalisation of its own, nothing else",
    install="pip install one-op-backend",
    probe=lambda: None,  # or a sentence that says why it cannot run here
    priority=-1,  # below NumPy's 0: `--backend auto` does not take it
)
