"""The contract check: vLLM accepts of a draft exactly what our own decoder accepts of it.

================  =================================================================================
``check``         the same prompts here and in vLLM, and the report
``comparison``    vLLM's trace beside that of our own decoder
``trace_format``  what a trace is asked for with, and what it answers: JSON
``engine``        traces from vLLM in this process
``trace``         the same as a program: ``python -m speculators.integrations.vllm.contract.trace``
``endpoint``      traces from a server that runs already
================  =================================================================================
"""
