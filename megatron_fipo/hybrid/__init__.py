"""The only place that knows both the actor and the engines."""
