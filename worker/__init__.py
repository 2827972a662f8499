"""The engine: schedule, run, sample, emit; and the runner that feeds it rows."""
