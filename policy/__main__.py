"""`python -m policy serve MODEL_DIR`: a model behind an OpenAI-compatible HTTP API, for agents of any kind; `python -m policy
random PRESET --out DIR`: a model directory with random weights."""

from __future__ import annotations

import argparse
import os
import signal
import sys
import threading
from pathlib import Path
from typing import Any

from envs.errors import user_errors

ALIVE = 10.0
"""Seconds between looks at whether the engine still answers."""
EXAMPLE = """
examples:
  python -m policy serve policy/cwm_tiny                          http://127.0.0.1:8000/v1, for this machine alone
  python -m policy serve runs/tiny/model --port 0 --slots 128     a free port, which is printed
  KEY=… python -m policy serve policy/cwm_tiny --host 0.0.0.0 --key-env KEY
  python -m policy random cwm-1b --out models/cwm-1b              random weights, and a tokenizer of words
then, for instance:
  curl http://127.0.0.1:8000/v1/chat/completions -H 'Content-Type: application/json' \\
      -d '{"messages": [{"role": "user", "content": "hello"}]}'
  python -m agents play --endpoint http://127.0.0.1:8000 --tokenizer policy/cwm_tiny --style plain
  mini-swe-agent: model class litellm, model_name openai/cwm_tiny, model_kwargs api_base: http://127.0.0.1:8000/v1,
      api_key: none, drop_params: true; cost_tracking: ignore_errors
Exit status: 0 ended (Ctrl-C), 1 the engine failed, 2 can't be run as asked.
"""


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(
        "python -m policy", description=__doc__, epilog=EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = p.add_subparsers(dest="command", required=True)
    serve = commands.add_parser(
        "serve",
        help="serve a model directory over HTTP",
        description=__doc__,
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    serve.add_argument("model", type=Path, help="model directory: config.json, model.safetensors, tokenizer.json")
    serve.add_argument("--engine", choices=("torch",), default="torch", help="what runs it (default: %(default)s)")
    serve.add_argument("--name", default="", help="the model's name for clients (default: the directory's)")
    serve.add_argument(
        "--host", default="127.0.0.1", help="address; another than this machine's needs a key (default: %(default)s)"
    )
    serve.add_argument("--port", type=int, default=8000, help="0 takes a free one (default: %(default)s)")
    serve.add_argument(
        "--key-env", default="", metavar="VAR", help="environment variable with the key that clients must send"
    )
    serve.add_argument("--slots", type=int, default=64, help="episodes whose KV is held at once (default: %(default)s)")
    serve.add_argument(
        "--max-context", type=int, default=0, metavar="N", help="tokens of an episode (default: the model's)"
    )
    serve.add_argument("--threads", type=int, default=1, help="torch threads of the engine (default: %(default)s)")
    serve.add_argument("--device", default="cpu", help="cpu or cuda (default: %(default)s)")
    serve.add_argument("--seed", type=int, default=0, help="of requests that bring none (default: %(default)s)")
    serve.add_argument("--deadline", type=float, default=600.0, metavar="S", help="of a request (default: %(default)s)")
    random = commands.add_parser(
        "random",
        help="make a model directory with random weights",
        description="Write a model of CWM's family with random weights, and a tokenizer whose tokens are words (policy/words.py).",
    )
    random.add_argument("preset", help="cwm-tiny, cwm-1b, cwm-8b or cwm-32b")
    random.add_argument("--out", type=Path, required=True, metavar="DIR", help="a new directory")
    random.add_argument("--vocab-size", type=int, metavar="N", help="words and control tokens (default: the preset's)")
    random.add_argument("--dtype", choices=("fp32", "bf16"), default="bf16", help="default: %(default)s")
    random.add_argument("--device", default="cpu", help="where it is made (default: %(default)s)")
    random.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    return p


def random(args: argparse.Namespace) -> int:
    """Write a model directory."""
    import torch

    from policy.models import ModelConfig, build, save
    from policy.words import word_tokenizer

    if args.out.exists():
        raise ValueError(f"--out {args.out} is there already; remove it, or name another directory")
    config = ModelConfig(name=args.preset, vocab_size=args.vocab_size)
    dtype = torch.bfloat16 if args.dtype == "bf16" else torch.float32
    model = build(config, args.seed, dtype=dtype, device=args.device)
    tokenizer = word_tokenizer(int(model.config.vocab_size))
    save(model, args.out)
    tokenizer.save(str(args.out / "tokenizer.json"))
    print(f"{args.out}: {sum(p.numel() for p in model.parameters()):,} parameters in {args.dtype}")
    return 0


def serve(args: argparse.Namespace, until: threading.Event) -> int:
    """Serve until `until` is set; status 1 where the engine failed."""
    from policy import renderer as rendering
    from policy.serve import ServeConfig, Server

    key = os.environ.get(args.key_env, "") if args.key_env else ""
    if args.key_env and not key:
        raise ValueError(f"environment variable {args.key_env} holds no key; set it, or leave out --key-env")
    renderer = rendering.load(args.model)
    engine, context = torch_engine(args)
    with engine:
        config = ServeConfig(
            model=args.name or args.model.resolve().name,
            max_context=context,
            host=args.host,
            port=args.port,
            key=key,
            deadline_s=args.deadline,
        )
        with Server(engine, renderer, config, check=lambda: engine.score([[0]])) as server:
            print(f"{config.model}, {context} tokens of context: {server.url} (Ctrl-C ends it)", flush=True)
            while not until.wait(ALIVE):
                engine.score([[0]])
    return 0


def torch_engine(args: argparse.Namespace) -> tuple[Any, int]:
    """The embedded engine on a model directory, and its context."""
    from policy import models
    from policy.torch_engine import EngineConfig, TorchEngine

    model = models.load(args.model)
    most = int(model.config.max_position_embeddings)
    if args.max_context > most:
        raise ValueError(f"--max-context {args.max_context}: model {args.model} has {most} positions; lower it")
    context = args.max_context or most
    config = EngineConfig(
        slots=args.slots,
        max_context=context,
        threads=args.threads,
        device=args.device,
        seed=args.seed,
        deadline_s=args.deadline,
    )
    return TorchEngine(model, config), context


def main(argv: list[str] | None = None) -> int:
    """The command; returns the exit status."""
    args = parser().parse_args(argv)
    if args.command == "random":
        return random(args)
    until = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: until.set())
    return serve(args, until)


if __name__ == "__main__":
    sys.exit(user_errors(main))
