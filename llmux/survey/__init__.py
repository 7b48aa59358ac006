"""What is on this machine that llmux could serve: model files, engines that run, GPUs, programs.

It looks only, and only on this machine: nothing is started, loaded or downloaded.
"""

from llmux.survey.host import Container, Engine, Gpu, Machine, probe
from llmux.survey.model_files import Gguf

__all__ = ["Container", "Engine", "Gguf", "Gpu", "Machine", "probe"]
