"""FP8 in a plain PyTorch loop: one line more than BF16, before the optimizer is built.

python examples/plain_loop.py                                      # a CPU, seconds, emulated FP8
python examples/plain_loop.py --size 0.5b --batch 8 --length 2048  # a Hopper GPU; --bf16 beside it
"""

import torch
import torch.nn.functional as F
from material import DEVICE, Report, build_model, options, random_windows, read_text
from torch import nn

from infir2 import convert_to_fp8


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--mlp", action="store_true", help="a small nn.Module instead of --model")
    parser.add_argument("--compile", action="store_true", help="torch.compile, in FP8 and in BF16")
    parser.add_argument("--accumulate", type=int, default=1, help="micro-batches of a step")
    args = parser.parse_args()
    text, generator = read_text(args.text), torch.Generator().manual_seed(0)

    model = build_model("mlp" if args.mlp else args.model, args.size).to(DEVICE)  # FP32 masters
    if not args.bf16:
        convert_to_fp8(model)  # in place
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, fused=True)
    call = torch.compile(model) if args.compile else model

    report = Report(args.steps, args.batch * args.length * args.accumulate)
    for _ in range(args.steps):
        mean = 0.0
        for _ in range(args.accumulate):
            ids = random_windows(text, args.batch, args.length + 1, generator)
            with torch.autocast(DEVICE, torch.bfloat16):  # the dtype that the FP8 kernels read
                out = call(ids[:, :-1])
                logits = getattr(out, "logits", out)
            loss = F.cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten())
            (loss / args.accumulate).backward()
            mean += loss.item() / args.accumulate
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        report.step(mean)
    report.end(model)
    if args.save:
        torch.save(model.state_dict(), args.save)  # FP32 masters, under the model's own names


if __name__ == "__main__":
    main()
