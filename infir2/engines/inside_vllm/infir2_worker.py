"""Methods that vLLM's workers get (`--worker-extension-cls`), called through `/collective_rpc`."""

import hashlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

CHUNK = 1024  # rows of the identity matrix at a time


class Infir2Worker:
    """Mixed into vLLM's worker class, whose `reload_weights` and `model_runner` it uses."""

    reload_weights: Any
    model_runner: Any
    parallel_config: Any
    rank: int

    def infir2_reload(self, directory: str) -> None:
        """Load the weights of `directory`."""
        self.reload_weights(weights_path=directory)
        head = getattr(self.model_runner.get_model(), "lm_head", None)
        method = getattr(head, "quant_method", None)
        if head is not None and method is not None:
            # vLLM 0.32.0 on a CPU computes with a repacked copy of the head, and a reload of tied
            # embeddings does not repack it: the logits would stay those of the first weights.
            method.process_weights_after_loading(head)

    def infir2_digests(self) -> dict[str, Any]:
        """SHA-256 of every weight that this rank computes with; of a quantized layer, "quantized".

        A linear layer's weight is what it makes of the identity matrix, in whatever form it is
        stored: exact, because each sum has one term that is not 0.
        """
        size = self.parallel_config.tensor_parallel_size
        digests = dict(_digests(self.model_runner.get_model()))
        return {"tp_rank": self.rank % size, "tp_size": size, "digests": digests}


@torch.inference_mode()
def _digests(model: nn.Module) -> Iterator[tuple[str, str]]:
    for name, module in model.named_modules():
        method = getattr(module, "quant_method", None)
        weight, bias = getattr(module, "weight", None), getattr(module, "bias", None)
        if isinstance(bias, Tensor):
            yield f"{name}.bias", _sha256([bias])
        if not isinstance(weight, Tensor):
            continue
        if method is None or name.endswith("embed_tokens"):
            yield f"{name}.weight", _sha256([weight.t() if weight.dim() == 2 else weight])
        elif type(method).__name__.startswith("Unquantized"):
            yield f"{name}.weight", _sha256(_columns(module, method))
        else:
            yield f"{name}.weight", "quantized"


def _columns(module: Any, method: Any) -> Iterator[Tensor]:
    """The columns of a layer's weight [rows, columns], as rows: what it makes of unit vectors."""
    num_columns = getattr(module, "input_size_per_partition", None) or module.embedding_dim
    device = module.weight.device
    for start in range(0, num_columns, CHUNK):
        count = min(CHUNK, num_columns - start)
        units = torch.zeros(count, num_columns, dtype=torch.bfloat16, device=device)
        units[torch.arange(count), start + torch.arange(count)] = 1
        yield method.apply(module, units, None)


def _sha256(parts: Any) -> str:
    """Of BF16 values; -0 counts as 0."""
    digest = hashlib.sha256()
    for part in parts:
        values = (part.to(torch.bfloat16) + 0).cpu().contiguous()
        digest.update(values.view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()
