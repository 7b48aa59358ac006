"""Modules that have another name now: the old one works for a release, with a DeprecationWarning.

A policy of a user's may import more of llmux than it has to. The finder is the first of all: a folder that is gone
may have left its bytecode behind, which Python would take for a package without files.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Mapping, Sequence
from importlib import import_module
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import TYPE_CHECKING, cast

if TYPE_CHECKING:
    from importlib.abc import Loader

RENAMED: Mapping[str, str] = {
    "llmux.accounts.catalogue": "llmux.accounts.pricing",
    "llmux.accounts.costs": "llmux.accounts.pricing",
    "llmux.accounts.past_requests": "llmux.accounts.usage",
    "llmux.accounts.store": "llmux.accounts.ledger_file",
    "llmux.admin.page": "llmux.admin.endpoints",
    "llmux.admin.routes": "llmux.admin.endpoints",
    "llmux.cli.accounts": "llmux.cli.keys",
    "llmux.cli.bystander": "llmux.cli.hook_probes",
    "llmux.cli.check_probe": "llmux.cli.check",
    "llmux.cli.commands": "llmux.cli.command_tree",
    "llmux.cli.config_writer": "llmux.cli.init",
    "llmux.cli.exit_codes": "llmux.cli.terminal",
    "llmux.cli.gateway": "llmux.cli.serve",
    "llmux.cli.hook_findings": "llmux.cli.hook_check",
    "llmux.cli.hook_scripts": "llmux.cli.hooks",
    "llmux.cli.lease": "llmux.cli.operate",
    "llmux.cli.logs": "llmux.cli.status",
    "llmux.cli.make_key": "llmux.cli.keys",
    "llmux.cli.probe": "llmux.cli.check",
    "llmux.cli.recent": "llmux.cli.status",
    "llmux.cli.remote": "llmux.cli.client",
    "llmux.cli.replay": "llmux.cli.simulate_tables",
    "llmux.cli.requests": "llmux.cli.status",
    "llmux.cli.simulate_exact": "llmux.cli.simulate_tables",
    "llmux.cli.tables": "llmux.cli.terminal",
    "llmux.cli.top": "llmux.cli.status",
    "llmux.cli.what_if": "llmux.cli.simulate_what_if",
    "llmux.config.address": "llmux.config.setting_types",
    "llmux.config.durations": "llmux.config.setting_types",
    "llmux.config.explain": "llmux.config.problems",
    "llmux.config.fields": "llmux.config.setting_types",
    "llmux.config.forward": "llmux.config.access",
    "llmux.config.interpolate": "llmux.config.load",
    "llmux.config.json_schema": "llmux.config.reference",
    "llmux.config.keys": "llmux.config.access",
    "llmux.config.levels": "llmux.config.residency",
    "llmux.config.machine_check": "llmux.config.checks",
    "llmux.config.model": "llmux.config.model_settings",
    "llmux.config.one_line": "llmux.config.model_settings",
    "llmux.config.policy": "llmux.config.schema",
    "llmux.config.remembered": "llmux.config.specs",
    "llmux.config.section": "llmux.config.setting_types",
    "llmux.config.settings": "llmux.config.reference",
    "llmux.config.sizes": "llmux.config.setting_types",
    "llmux.config.state": "llmux.config.schema",
    "llmux.config.store_address": "llmux.config.setting_types",
    "llmux.config.words": "llmux.config.setting_types",
    "llmux.core.costs": "llmux.estimates.costs",
    "llmux.core.engine_load": "llmux.estimates.meter",
    "llmux.core.errors": "llmux.core.phases",
    "llmux.core.estimates": "llmux.core.spec",
    "llmux.core.policy_memory": "llmux.policies.adaptive",
    "llmux.core.snapshot": "llmux.core.policy_calls",
    "llmux.core.successors": "llmux.core.policy",
    "llmux.core.transitions": "llmux.core.policy",
    "llmux.estimates.engine_load": "llmux.estimates.meter",
    "llmux.extract.body_store": "llmux.extract.body",
    "llmux.extract.brackets": "llmux.extract.json_scan",
    "llmux.extract.field": "llmux.extract.model_field",
    "llmux.extract.flag": "llmux.extract.body",
    "llmux.extract.limits": "llmux.extract.body",
    "llmux.extract.multipart": "llmux.extract.model_field",
    "llmux.extract.query": "llmux.extract.model_field",
    "llmux.extract.store": "llmux.extract.body",
    "llmux.fleet.registration": "llmux.fleet.store",
    "llmux.fleet.reporting": "llmux.runtime.status_document",
    "llmux.fleet.reports": "llmux.fleet.fleet_view",
    "llmux.fleet.store_client": "llmux.fleet.store",
    "llmux.gateway.fleet_usage": "llmux.gateway.views",
    "llmux.gateway.sharing": "llmux.gateway.store_sync",
    "llmux.hookrunner.group": "llmux.hookrunner.hook_process",
    "llmux.hookrunner.leftover": "llmux.hookrunner.hook_process",
    "llmux.hookrunner.output": "llmux.hookrunner.job",
    "llmux.hookrunner.pipe": "llmux.hookrunner.job",
    "llmux.hookrunner.process": "llmux.hookrunner.hook_process",
    "llmux.hookrunner.process_groups": "llmux.hookrunner.hook_process",
    "llmux.hookrunner.spawn": "llmux.hookrunner.hook_process",
    "llmux.keys": "llmux.config.access",
    "llmux.llama_swap.page": "llmux.llama_swap.conversion",
    "llmux.llama_swap.settings": "llmux.llama_swap.source",
    "llmux.llama_swap.translation": "llmux.llama_swap.conversion",
    "llmux.middleware.deadline": "llmux.middleware.context",
    "llmux.middleware.denied": "llmux.middleware.paths",
    "llmux.middleware.hosts": "llmux.middleware.origin",
    "llmux.middleware.keyring": "llmux.middleware.authentication",
    "llmux.middleware.keys": "llmux.middleware.authentication",
    "llmux.middleware.refusing": "llmux.proxy.envelope",
    "llmux.middleware.routing": "llmux.middleware.rerouting",
    "llmux.notify": "llmux.process",
    "llmux.observability.events": "llmux.observability.log",
    "llmux.observability.figures": "llmux.observability.decision_log",
    "llmux.observability.log_events": "llmux.observability.log",
    "llmux.observability.record_reading": "llmux.observability.record",
    "llmux.observability.state": "llmux.observability.state_file",
    "llmux.observability.writer": "llmux.observability.log",
    "llmux.proxy.early": "llmux.proxy.early_response",
    "llmux.proxy.tunnel": "llmux.proxy.relay",
    "llmux.proxy.usage": "llmux.proxy.token_usage",
    "llmux.runtime.activities": "llmux.runtime.requests",
    "llmux.runtime.auto": "llmux.runtime.policy_chooser",
    "llmux.runtime.explanations": "llmux.runtime.history",
    "llmux.runtime.fair": "llmux.runtime.requests",
    "llmux.runtime.guard": "llmux.runtime.request_handle",
    "llmux.runtime.health": "llmux.runtime.status_document",
    "llmux.runtime.hook_jobs": "llmux.runtime.switcher",
    "llmux.runtime.host_report": "llmux.runtime.status_document",
    "llmux.runtime.riders": "llmux.runtime.request_handle",
    "llmux.runtime.status": "llmux.runtime.status_document",
    "llmux.runtime.ticket": "llmux.runtime.request_handle",
    "llmux.simulator.adopting": "llmux.simulator.choosing",
    "llmux.simulator.advice": "llmux.simulator.statistics",
    "llmux.simulator.beside": "llmux.simulator.look_back",
    "llmux.simulator.closed": "llmux.simulator.synthetic",
    "llmux.simulator.costs": "llmux.simulator.cost_matrix",
    "llmux.simulator.engine": "llmux.simulator.engine_model",
    "llmux.simulator.fitting": "llmux.simulator.engine_model",
    "llmux.simulator.misjudged": "llmux.simulator.run",
    "llmux.simulator.paired": "llmux.simulator.statistics",
    "llmux.simulator.plot": "llmux.simulator.statistics",
    "llmux.simulator.reading": "llmux.simulator.trace",
    "llmux.simulator.replay": "llmux.simulator.recorded",
    "llmux.simulator.residency": "llmux.simulator.configured",
    "llmux.simulator.serving": "llmux.simulator.engine_model",
    "llmux.survey.candidates": "llmux.survey.model_files",
    "llmux.survey.engines": "llmux.survey.host",
    "llmux.survey.gguf": "llmux.survey.model_files",
    "llmux.survey.machine": "llmux.survey.host",
    "llmux.targets.codecs.blocks": "llmux.targets.codecs.answer",
    "llmux.targets.codecs.events": "llmux.targets.codecs.answer",
    "llmux.targets.fields": "llmux.targets.field_scanner",
    "llmux.targets.routing": "llmux.targets.route_rules",
    "llmux.targets.spill": "llmux.targets.route_rules",
    "llmux.targets.variants": "llmux.middleware.targeting",
    "llmux.tracing": "llmux.observability",
    "llmux.tracing.spans": "llmux.observability.spans",
    "llmux.tracing.traces": "llmux.observability.spans",
    "llmux.tracing.tracing": "llmux.observability.spans",
    "llmux.upstream.activity": "llmux.upstream.engine",
    "llmux.upstream.address": "llmux.upstream.engine",
    "llmux.upstream.errors": "llmux.upstream.engine",
    "llmux.upstream.framing": "llmux.upstream.head",
    "llmux.watch": "llmux.process",
}
"""By the old name: the module that has its contents."""


class _Renamed:
    """Finds a module under its old name. Its base classes take half as long to import as Python to start."""

    def find_spec(
        self,
        fullname: str,
        path: Sequence[str] | None,  # noqa: ARG002 - the protocol's
        target: ModuleType | None = None,  # noqa: ARG002
    ) -> ModuleSpec | None:
        if fullname not in RENAMED:
            return None
        folder = any(name.startswith(f"{fullname}.") for name in RENAMED)
        return ModuleSpec(fullname, cast("Loader", self), is_package=folder)

    def create_module(self, spec: ModuleSpec) -> None:  # the usual one
        del spec

    def exec_module(self, module: ModuleType) -> None:
        new = RENAMED[module.__name__]
        message = f"{module.__name__} is now {new}; the old name goes in the next release"
        warnings.warn(message, DeprecationWarning, stacklevel=2)
        found = vars(import_module(new))
        vars(module).update({name: value for name, value in found.items() if not name.startswith("__")})


def install() -> None:
    """Have the old names found, too."""
    sys.meta_path.insert(0, _Renamed())
