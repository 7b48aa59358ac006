"""The providers that LiteLLM knows by name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from llmux.litellm.source import Params

_OPENAI = ("chat", "completions", "responses", "embeddings")
_CHAT = ("chat",)
_EMBEDS = ("chat", "embeddings")
_MOST = ("chat", "completions", "embeddings")


class Provider(NamedTuple):
    """An endpoint that LiteLLM knows: its address, its APIs, and the variable with its key."""

    url: str | None = None
    apis: tuple[str, ...] | None = None  # None: any
    variable: str | None = None


PROVIDERS: Mapping[str, Provider] = {
    "openai": Provider("https://api.openai.com/v1", _OPENAI, "OPENAI_API_KEY"),
    "text-completion-openai": Provider("https://api.openai.com/v1", _OPENAI, "OPENAI_API_KEY"),
    "anthropic": Provider("https://api.anthropic.com", ("messages", "count_tokens"), "ANTHROPIC_API_KEY"),
    "openrouter": Provider("https://openrouter.ai/api/v1", ("chat", "completions"), "OPENROUTER_API_KEY"),
    "groq": Provider("https://api.groq.com/openai/v1", _CHAT, "GROQ_API_KEY"),
    "mistral": Provider("https://api.mistral.ai/v1", ("chat", "embeddings"), "MISTRAL_API_KEY"),
    "deepseek": Provider("https://api.deepseek.com/v1", _CHAT, "DEEPSEEK_API_KEY"),
    "xai": Provider("https://api.x.ai/v1", _CHAT, "XAI_API_KEY"),
    "cerebras": Provider("https://api.cerebras.ai/v1", ("chat", "completions"), "CEREBRAS_API_KEY"),
    "together_ai": Provider("https://api.together.xyz/v1", _MOST, "TOGETHERAI_API_KEY"),
    "fireworks_ai": Provider("https://api.fireworks.ai/inference/v1", _MOST, "FIREWORKS_AI_API_KEY"),
    "nvidia_nim": Provider("https://integrate.api.nvidia.com/v1", _MOST, "NVIDIA_NIM_API_KEY"),
    "ollama": Provider("http://localhost:11434", None),
    "ollama_chat": Provider("http://localhost:11434", None),
    "hosted_vllm": Provider(None, None, "HOSTED_VLLM_API_KEY"),
    "lm_studio": Provider(None, None, "LM_STUDIO_API_KEY"),
    "llamafile": Provider("http://127.0.0.1:8080", None),
    "litellm_proxy": Provider(None, None, "LITELLM_PROXY_API_KEY"),
    "gemini": Provider("https://generativelanguage.googleapis.com/v1beta/openai", _EMBEDS, "GEMINI_API_KEY"),
    "cohere": Provider("https://api.cohere.ai/compatibility/v1", _EMBEDS, "COHERE_API_KEY"),
    "cohere_chat": Provider("https://api.cohere.ai/compatibility/v1", _EMBEDS, "COHERE_API_KEY"),
    "deepinfra": Provider("https://api.deepinfra.com/v1/openai", _EMBEDS, "DEEPINFRA_API_KEY"),
    "dashscope": Provider("https://dashscope.aliyuncs.com/compatible-mode/v1", _EMBEDS, "DASHSCOPE_API_KEY"),
    "featherless_ai": Provider("https://api.featherless.ai/v1", _CHAT, "FEATHERLESS_AI_API_KEY"),
    "hyperbolic": Provider("https://api.hyperbolic.xyz/v1", _CHAT, "HYPERBOLIC_API_KEY"),
    "moonshot": Provider("https://api.moonshot.ai/v1", _CHAT, "MOONSHOT_API_KEY"),
    "nebius": Provider("https://api.studio.nebius.ai/v1", _EMBEDS, "NEBIUS_API_KEY"),
    "novita": Provider("https://api.novita.ai/v3/openai", _CHAT, "NOVITA_API_KEY"),
    "sambanova": Provider("https://api.sambanova.ai/v1", _CHAT, "SAMBANOVA_API_KEY"),
    "vercel_ai_gateway": Provider("https://ai-gateway.vercel.sh/v1", _CHAT, "VERCEL_AI_GATEWAY_API_KEY"),
    "volcengine": Provider("https://ark.cn-beijing.volces.com/api/v3", _CHAT, "VOLCENGINE_API_KEY"),
    "zai": Provider("https://api.z.ai/api/paas/v4", _CHAT, "ZAI_API_KEY"),
    "custom_openai": Provider(None, _MOST),
    "openai_like": Provider(None, _MOST),
    "xinference": Provider(None, _MOST),
    "infinity": Provider(None, ("embeddings",)),
}
"""Those whose endpoints speak OpenAI's or Anthropic's API as it is."""
BESIDE = frozenset({"gemini", "cohere", "cohere_chat"})
"""Those which speak OpenAI's API beside one of their own; LiteLLM speaks that, so their `api_base` leads to it."""
OLLAMA = frozenset({"ollama", "ollama_chat"})
_BY_NAME = (("claude", "anthropic"), ("gpt", "openai"), ("o1", "openai"), ("o3", "openai"), ("o4", "openai"),
            ("chatgpt", "openai"), ("text-embedding", "openai"), ("deepseek", "deepseek"))  # fmt: skip
FOREIGN = frozenset(
    {
        "azure", "azure_ai", "bedrock", "vertex_ai", "vertex_ai_beta", "gemini", "sagemaker", "cohere",
        "cohere_chat", "huggingface", "replicate", "watsonx", "databricks", "predibase", "vllm", "petals", "ai21",
        "nlp_cloud", "aleph_alpha", "palm", "perplexity", "deepinfra", "cloudflare", "oci", "snowflake", "github",
        "github_copilot",
    }
)  # fmt: skip


def provider_of(params: Params) -> tuple[str, str]:
    """Return the provider of a deployment, and the model's name there."""
    first, slash, rest = params.model.partition("/")
    if params.custom_llm_provider:
        own = params.custom_llm_provider
        return own, rest if slash and first == own else params.model
    if slash and (first in PROVIDERS or not (params.api_base or params.base_url)):
        return first, rest
    if params.api_base or params.base_url:
        return ("openai_like", params.model) if first not in FOREIGN else (first, rest)
    return next((name for prefix, name in _BY_NAME if params.model.startswith(prefix)), params.model), params.model
