"""``llmux gateway``: one endpoint for many hosts, each of which is an llmux with a GPU of its own.

- ``dispatcher``  runs the placement (``llmux.fleet``): requests enter, get their host, and leave;
- ``hosts``       follows the hosts: receives their reports, notices whether they can be reached, and queries them;
- ``handler``     one request: its body, its host, the answer back, the next host where that is safe;
- ``store_sync``  shares state with other gateways, and learns which hosts have registered;
- ``shared_limits``  what is left of the keys' limits, over all gateways;
- ``views``       what operators, clients and Prometheus see;
- ``service``     all of it as an application and a process.

A gateway runs no hook and decides no sleep. It is stateless: everything it knows comes from the hosts.
"""
