"""Block-scaled FP8: formats, conversions, linear layers, and the operations of a decoder.

`infir2.numerics.linear` and docs/numerics.md explain the algebra. Example:

    >>> layer = Fp8Linear.from_linear(torch.nn.Linear(576, 192))
    >>> layer(torch.randn(10, 576, dtype=torch.bfloat16)).shape
    torch.Size([10, 192])
"""

from infir2.numerics.convert import convert_to_fp8
from infir2.numerics.error import relative_error, snr_db
from infir2.numerics.formats import Fp8Tensor
from infir2.numerics.head import head_logits, token_logprobs
from infir2.numerics.linear import Fp8Linear
from infir2.numerics.ops import (
    RMSNorm,
    add_linear,
    attention_inputs,
    feed_forward,
    linear,
    quantize_weights,
    rms_norm,
    swiglu,
)
from infir2.numerics.ops_reference import apply_rope
from infir2.numerics.quantize import dequantize, nonfinite_blocks, quantize, transpose
from infir2.numerics.saved_activations import SavedActivations
from infir2.numerics.weight_cache import invalidate
