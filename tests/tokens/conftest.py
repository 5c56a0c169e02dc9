"""Models that see images, as the tests of methods for them have them."""

from tests.steer.vision.conftest import seer  # noqa: F401
