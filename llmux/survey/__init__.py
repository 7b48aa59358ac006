"""What is on this machine that llmux could serve: model files, engines that run, GPUs, programs.

It looks only, and only on this machine: nothing is started, loaded or downloaded.
"""

from llmux.survey.engines import Engine, probe
from llmux.survey.gguf import Gguf
from llmux.survey.machine import Container, Gpu, Machine

__all__ = ["Container", "Engine", "Gguf", "Gpu", "Machine", "probe"]
