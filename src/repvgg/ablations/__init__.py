"""Tables 6 and 7 (paper, Sect. 4.2), and training-time blocks from other papers."""
