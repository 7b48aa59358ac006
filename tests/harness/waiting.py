"""How long tests wait for what has to happen: a machine ten times slower than usual has to be quick enough."""

PATIENCE = 60.0  # seconds
