"""What is on this machine that llmux could serve: model files, engines that run, GPUs, programs.

It looks only, and only on this machine: nothing is started, loaded or downloaded.
"""
