"""FP8 in TRL's SFTTrainer: convert the model before the trainer gets it (pip install trl).

python examples/trl_sft.py                                        # a CPU, seconds, emulated FP8
python examples/trl_sft.py --size 0.5b --batch 8 --length 2048    # a Hopper GPU; --bf16 beside it

Give SFTTrainer a model in FP32, not a name: it loads a named one in its file's dtype. The
tokenizer, one token per character, is made here because the example needs no network.
"""

import tempfile

from datasets import Dataset
from hf_trainer import Losses
from material import DEVICE, Report, build_model, options, read_text
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, PrinterCallback
from trl import SFTConfig, SFTTrainer

from infir2 import convert_to_fp8


def character_tokenizer() -> PreTrainedTokenizerFast:
    vocabulary = {chr(code): code for code in range(256)}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="?"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="\n", pad_token="\0")


def main() -> None:
    args = options(__doc__).parse_args()
    lines = read_text(args.text).decode(errors="replace").splitlines()
    rows = [{"prompt": line[: len(line) // 2], "completion": line[len(line) // 2 :]}
            for line in lines]  # fmt: skip
    model = build_model(args.model, args.size)
    if not args.bf16:
        convert_to_fp8(model)  # before SFTTrainer, which moves the model and builds the optimizer
    report = Report(args.steps, args.batch * args.length)
    settings = SFTConfig(
        output_dir=tempfile.mkdtemp(), max_steps=args.steps, learning_rate=args.lr, bf16=True,
        per_device_train_batch_size=args.batch, max_length=args.length, packing=True,
        use_cpu=DEVICE == "cpu", lr_scheduler_type="constant", logging_steps=1, disable_tqdm=True,
        save_strategy="no", report_to="none",
    )  # fmt: skip
    trainer = SFTTrainer(
        model, settings, train_dataset=Dataset.from_list(rows), callbacks=[Losses(report)],
        processing_class=character_tokenizer(),
    )  # fmt: skip
    trainer.remove_callback(PrinterCallback)  # the report prints
    trainer.train()
    report.end(model)
    if args.save:
        trainer.save_model(str(args.save))


if __name__ == "__main__":
    main()
