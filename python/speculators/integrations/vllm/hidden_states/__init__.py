"""The verifier's hidden states out of vLLM: ``--generate.source=vllm`` and ``files``.

==============  ===================================================================================
``source``      a server that is started or runs already, as a ``HiddenStateSource``
``client``      requests to it, asked again where that may help
``connector``   what writes the states inside vLLM
``files``       states that another program has already written
``comparison``  whether they are those of transformers
==============  ===================================================================================
"""
