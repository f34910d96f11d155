"""The paper's tables and figures about speed, cost and memory, by one command each."""
