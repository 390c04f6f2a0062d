"""``python -m speculators.ops``: which operator back ends there are, which serve what, and why."""

from speculators.ops import backend, host

print(backend.report())
print(host.report())
