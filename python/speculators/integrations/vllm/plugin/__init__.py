"""What runs inside vLLM, in each of its processes.

====================  =============================================================================
``registration``      ``register``, which vLLM calls, maybe more than once
``speculator_types``  the types ``eagle`` and ``hass``, in terms of vLLM's configuration
``eagle_model``       their draft model, on vLLM's own parallel layers
``strict_weights``    what a draft's file must have, no more and no less
``cpu_sampling``      a defect of vLLM's sampling on a CPU, mended where it is found
``internals``         what we take from vLLM's insides, checked before it is used
====================  =============================================================================
"""
