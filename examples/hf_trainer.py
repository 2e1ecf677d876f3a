"""FP8 in Hugging Face's Trainer: convert the model before the Trainer gets it (needs accelerate).

python examples/hf_trainer.py --save /tmp/trained                  # a CPU, seconds, emulated FP8
python examples/hf_trainer.py --size 0.5b --batch 8 --length 2048  # a Hopper GPU; --bf16 beside it

The model is in FP32 and bf16=True lets autocast choose BF16 for its operations, so the optimizer
updates FP32 masters. What `save_model` writes is a plain model: `from_pretrained` loads the bits.
"""

import tempfile

import torch
from material import DEVICE, Report, build_model, options, random_windows, read_text
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from infir2 import convert_to_fp8


class Losses(TrainerCallback):
    """Hands each step's loss to the report."""

    def __init__(self, report: Report) -> None:
        self.report = report

    def on_log(self, args, state, control, logs=None, **kwargs) -> None:
        if "loss" in (logs or {}):
            self.report.step(float(logs["loss"]))


def main() -> None:
    args = options(__doc__).parse_args()
    windows = random_windows(read_text(args.text), args.steps * args.batch, args.length,
                             torch.Generator().manual_seed(0)).cpu()  # fmt: skip
    model = build_model(args.model, args.size)
    if not args.bf16:
        convert_to_fp8(model)  # before Trainer, which moves the model and builds the optimizer
    report = Report(args.steps, args.batch * args.length)
    settings = TrainingArguments(
        output_dir=tempfile.mkdtemp(), max_steps=args.steps, learning_rate=args.lr, bf16=True,
        per_device_train_batch_size=args.batch, use_cpu=DEVICE == "cpu", logging_steps=1,
        lr_scheduler_type="constant", disable_tqdm=True, save_strategy="no", report_to="none",
    )  # fmt: skip
    rows = [{"input_ids": row, "labels": row} for row in windows]
    trainer = Trainer(model, settings, train_dataset=rows, callbacks=[Losses(report)])
    trainer.remove_callback(PrinterCallback)  # the report prints
    trainer.train()
    report.end(model)
    if args.save:
        trainer.save_model(str(args.save))
        reloaded = type(model).from_pretrained(args.save)
        for name, value in model.state_dict().items():
            assert torch.equal(value.cpu(), reloaded.state_dict()[name]), name
        print(f"{args.save}: from_pretrained gives the trained weights")


if __name__ == "__main__":
    main()
