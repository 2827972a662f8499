"""The engine: schedule, run, sample, emit; and the queue side, which opens the models and feeds it rows."""
