"""Facts about a run that follow from its configuration before it starts: settings, model, FLOPs, memory and steps."""
