"""Published ways to make vision–language models look at the image, one file each."""

from regard.steer.vision._dual_stream import dual_stream, visual_streams
from regard.steer.vision._gift import FuseGaze, gaze_saliency, gift
from regard.steer.vision._image_boost import image_boost
from regard.steer.vision._var import RedistributeSinks, var
from regard.steer.vision._vhr import vhr, vision_aware_heads
from regard.steer.vision._vif import inactive_tokens, vif
from regard.steer.vision.agla import AGLA, keep_relevant
from regard.steer.vision.avisc import AvisC, blind_tokens
from regard.steer.vision.bottleneck import AttentionBottleneck
from regard.steer.vision.emphasize import Emphasize
from regard.steer.vision.rebalancing import Rebalancing, noised, significant_tokens

__all__ = [
    "AGLA",
    "AttentionBottleneck",
    "AvisC",
    "Emphasize",
    "FuseGaze",
    "Rebalancing",
    "RedistributeSinks",
    "blind_tokens",
    "dual_stream",
    "gaze_saliency",
    "gift",
    "image_boost",
    "inactive_tokens",
    "keep_relevant",
    "noised",
    "significant_tokens",
    "var",
    "vhr",
    "vif",
    "vision_aware_heads",
    "visual_streams",
]
