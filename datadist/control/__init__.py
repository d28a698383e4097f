"""How peers meet and talk: frames, sessions, the meeting place, and the thread that serves them."""
