"""One model on many processes: FSDP2 with FP8 all-gather, tensor, sequence and context parallelism, and what ranks agree on."""
