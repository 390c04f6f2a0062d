"""The on-disk format: what stands in a speculator's ``config.json``, typed and validated.

=======================  ===========================================================================
``proposals``            how a speculator proposes tokens: greedy, sampling, static or dynamic tree
``speculators_config``   the block ``speculators_config``: algorithm, proposal methods, verifier
``schemas``              the whole file, one pydantic model per type: eagle, hass, eagle3
``model_config``         the same as transformers sees it: ``SpeculatorModelConfig`` and its types
``errors``               one error for everything that is wrong with a configuration
=======================  ===========================================================================

The schemas are the truth; the transformers classes are a thin layer over them. A key that a schema
does not know is kept, so that reading and writing a directory loses nothing.
"""
