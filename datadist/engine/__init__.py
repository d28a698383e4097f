"""The engine: options, start, dispatch of messages, and the parts that it consists of."""
