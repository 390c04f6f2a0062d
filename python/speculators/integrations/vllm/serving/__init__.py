"""A draft in a server, from its files to an answer.

===========  ======================================================================================
``checks``   whether vLLM can serve a draft's directory as it was trained
``command``  vLLM's command for a draft, and this process turned into it
``server``   a server that is started, waited for and stopped
``client``   a server that is asked: all of the library's requests to vLLM go through it
===========  ======================================================================================
"""
