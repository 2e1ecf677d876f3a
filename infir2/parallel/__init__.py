"""One model on many ranks: FSDP2 with FP8 all-gather, tensor, sequence and context parallelism."""
