"""Metrics, logs and traces for any service: a library that knows nothing of what the service does.

The product hands in its metric catalogue as data; names of metrics, labels and log fields are its own.
"""
