"""The HTTP side of LMX: OpenAI requests in, one ZeroMQ hop to the worker of the model, answers out.

No MLX and no tokenizer here: a gateway starts in half a second and knows models only from the supervisor's catalog.
"""
