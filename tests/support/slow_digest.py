"""A hash that waits before it reads its input, which reveals code that changes the input meanwhile."""

import hashlib
import time

_sha256 = hashlib.sha256


class SlowDigest:
    """Replaces hashlib.sha256."""

    def __init__(self) -> None:
        self._digest = _sha256()

    def update(self, block: memoryview) -> None:
        time.sleep(0.01)
        self._digest.update(block)

    def hexdigest(self) -> str:
        return self._digest.hexdigest()
