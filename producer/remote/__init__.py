"""A loramill server, as a client of its HTTP API sees it: requests decided apart from how they are sent."""
