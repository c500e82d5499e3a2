"""The package `kernels` by a name that is ours alone, for beside Hugging Face's: `from calcformer import kernels`.

Both packages are installed into one folder, where only `__init__.py` is in both. So this works whichever was last.
"""

from calcformer import __version__ as __version__
from kernels import nn as nn
from kernels import reference as reference
from kernels.attention.api import AttentionResult as AttentionResult
from kernels.attention.api import scaled_dot_product_attention as scaled_dot_product_attention
from kernels.attention.explanation import explain as explain
from kernels.attention.varlen import varlen_attention as varlen_attention
from kernels.layer_norm.api import add_layer_norm as add_layer_norm
from kernels.layer_norm.api import add_rms_norm as add_rms_norm
from kernels.layer_norm.api import layer_norm as layer_norm
from kernels.layer_norm.api import rms_norm as rms_norm
from kernels.replace import Report as Report
from kernels.replace import fuse as fuse
from kernels.replace import unfuse as unfuse
