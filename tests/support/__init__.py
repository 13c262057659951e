"""What the tests share: a platform that really runs, engines that misbehave, sockets with bare hands."""
