"""Where jobs and their rows live: the journal and files that appear whole."""
