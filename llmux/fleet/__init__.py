"""Many hosts, each with one GPU, behind one endpoint.

The pure half, in the style of ``llmux.core`` (events in, effects out, time injected):

- ``events``      what happens to a gateway's placement, and what it wants done;
- ``fleet_view``  what hosts report, and what a gateway knows of all of them, indexed so that a placement among a
  thousand is cheap;
- ``routes``      the rules that choose a host: ``least_wait`` and the practised ones;
- ``placement``   the machine: one owner of every request's way to a host.

Beside it: the ``store`` that hosts and gateways share, perhaps ``embedded``; ``loading`` of routes; and
``simulation``, all of it in virtual time.
"""
