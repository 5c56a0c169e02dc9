"""AttentionCall, and how calls are found in a model."""

from regard.calls.call import AttentionCall, normalize
from regard.calls.modules import ModuleStack
from regard.calls.seam import Listener, Reading, listen

__all__ = ["AttentionCall", "Listener", "ModuleStack", "Reading", "listen", "normalize"]
