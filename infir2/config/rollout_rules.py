"""Combinations of `[rollout]` that cannot work; see `rules`."""

from infir2.config.schema import RolloutSection

Rule = tuple[bool, str, str]


def rollout_rules(rollout: RolloutSection) -> list[Rule]:
    """What rules out an engine, its servers or how they get their weights."""
    return [*_engine(rollout), *_weights_of_servers(rollout)]


def _engine(rollout: RolloutSection) -> list[Rule]:
    engine, default = rollout.engine, RolloutSection()
    is_ours = engine in ("native", "infir2")
    of_our_servers = ("engines", "tensor_parallel", "python", "memory_fraction", "server_options")
    changed = [name for name in of_our_servers if getattr(rollout, name) != getattr(default, name)]
    return [
        (
            engine == "native" and bool(rollout.urls),
            "rollout.urls",
            "names servers; say what they are: rollout.engine = infir2, sglang or vllm.",
        ),
        (
            bool(changed) and (engine == "native" or bool(rollout.urls)),
            f"rollout.{changed[0] if changed else ''}",
            "is for servers that infir2 starts: set rollout.engine and leave rollout.urls empty, "
            "or remove it.",
        ),
        (
            rollout.exact and not is_ours,
            "rollout.exact",
            f"is for rollout.engine = native or infir2; {engine} sums in another order.",
        ),
        (
            is_ours and rollout.kv_cache_dtype != "auto",
            "rollout.kv_cache_dtype",
            f"= {rollout.kv_cache_dtype} would change the log-probabilities of rollout.engine = "
            f"{engine}, which are the trainer's; remove it, or choose sglang or vllm.",
        ),
        (
            engine == "infir2" and (rollout.tensor_parallel > 1 or rollout.memory_fraction > 0),
            "rollout.engine",
            "= infir2 has neither rollout.tensor_parallel nor rollout.memory_fraction; remove them "
            "(rollout.cache_gib bounds its cache).",
        ),
        (
            engine in ("sglang", "vllm") and not rollout.urls and not rollout.python,
            "rollout.python",
            f"is missing; name the Python interpreter of the environment that has {engine}, whose "
            "packages are not infir2's (docs/engines.md).",
        ),
    ]


def _weights_of_servers(rollout: RolloutSection) -> list[Rule]:
    engine = rollout.engine
    return [
        (
            rollout.weight_transfer == "nccl" and engine != "sglang",
            "rollout.weight_transfer",
            f"= nccl is for rollout.engine = sglang, and rollout.engine is {engine}; remove it.",
        ),
        (
            rollout.sleep and (engine not in ("sglang", "vllm") or bool(rollout.urls)),
            "rollout.sleep",
            "is for SGLang and vLLM servers that infir2 starts beside the trainer; remove it.",
        ),
        (
            rollout.sleep and rollout.weight_transfer == "nccl",
            "rollout.sleep",
            "is for servers on the trainer's GPUs, and rollout.weight_transfer = nccl for servers "
            "on others; remove one of them.",
        ),
    ]
