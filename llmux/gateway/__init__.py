"""``llmux gateway``: one endpoint before many hosts, each of which is an llmux with a GPU of its own.

- ``dispatcher``  runs the placement (``llmux.fleet``): requests enter and leave, and are told where to go;
- ``hosts``       follows the hosts: their reports, whether they can be reached; and asks them;
- ``handler``     a request on its way: its body, its host, the answer back, the next host where that is safe;
- ``store_sync``  what it shares with other gateways, and which hosts have made themselves known;
- ``shared_limits``  what keys have left of their limits, over all gateways;
- ``views``       what operators, clients and Prometheus see;
- ``service``     all of it as an application and a process.

A gateway runs no hook and decides no sleep. It is stateless: what it knows it has from the hosts.
"""
