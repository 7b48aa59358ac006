#!/usr/bin/env python3
"""llama.cpp's own HTTP server as a foreground process, without a GPU and without building anything.

    pip install xllamacpp
    engine.py --model FILE.gguf --port 8001 --alias NAME

It takes those of llama-server's options that the hooks and the tests need, by the same names, and ends
like llama-server: TERM or INT stops it, a second one ends it at once.
"""

from __future__ import annotations

import argparse
import signal
import sys
import threading
from types import FrameType

import xllamacpp


def options() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description="llama.cpp's HTTP server out of the xllamacpp package.")
    parser.add_argument("-m", "--model", required=True, help="path of the GGUF file")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8080)
    parser.add_argument("-a", "--alias", help="the model's name in answers and in /v1/models")
    parser.add_argument("-c", "--ctx-size", type=int, default=8192, help="shared by the slots")
    parser.add_argument("-t", "--threads", type=int, default=1)
    parser.add_argument("-np", "--parallel", type=int, default=2, help="requests answered at a time")
    parser.add_argument("--embedding", action="store_true", help="serve embeddings instead of text")
    parser.add_argument("--api-key")
    return parser.parse_args()


def parameters(given: argparse.Namespace) -> xllamacpp.CommonParams:
    """Translate the command line into llama.cpp's parameters."""
    params = xllamacpp.CommonParams()
    params.model.path = given.model
    params.hostnames = [given.host]
    params.port = given.port
    params.n_ctx = given.ctx_size
    params.n_parallel = given.parallel
    params.cpuparams.n_threads = given.threads
    params.cpuparams_batch.n_threads = given.threads
    params.n_gpu_layers = 0
    params.offline = True
    params.ui = False
    params.endpoint_metrics = True
    params.endpoint_slots = True
    if given.alias:
        params.model_alias = {given.alias}
    if given.api_key:
        params.api_keys = [given.api_key]
    if given.embedding:
        params.embedding = True
        params.pooling_type = xllamacpp.llama_pooling_type.LLAMA_POOLING_TYPE_MEAN
    return params


def main() -> None:
    """Serve until a signal says stop."""
    given = options()
    stop = threading.Event()

    signals = (signal.SIGTERM, signal.SIGINT)

    def on_signal(_number: int, _frame: FrameType | None) -> None:
        for number in signals:  # the next one need not wait for answers under way
            signal.signal(number, signal.SIG_DFL)
        stop.set()

    for number in signals:
        signal.signal(number, on_signal)
    server = xllamacpp.Server(parameters(given))
    print(f"serving {given.alias or given.model} on {server.listening_address}", flush=True)
    stop.wait()
    print("stopping", file=sys.stderr, flush=True)
    del server


if __name__ == "__main__":
    main()
