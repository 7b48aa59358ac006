"""What llmux could serve on this machine: model files, running engines, GPUs, programs.

It only looks, and only on this machine: nothing is started, loaded or downloaded.
"""
