"""The parts put together: options, start, dispatch of messages, and the engine itself."""
