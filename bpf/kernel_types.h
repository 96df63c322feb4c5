/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/*
 * The fields of kernel structures that the programs read, relocated at load time (CO-RE) to wherever
 * the running kernel has them. Declared here rather than taken from a dump of one kernel's types, so
 * that the objects build without that kernel at hand.
 */
#pragma once

#include <linux/types.h>

#pragma clang attribute push(__attribute__((preserve_access_index)), apply_to = record)

struct sock_common {
	unsigned long skc_flags;
};

struct sock {
	struct sock_common __sk_common;
	int sk_err;
};

struct tcp_sock {
	__u64 bytes_sent;
	__u64 bytes_retrans;
	__u64 bytes_received;
	__u32 write_seq;
};

#pragma clang attribute pop

/* Bit of sk_flags that tcp_fin() sets: the peer's FIN was received (include/net/sock.h, enum sock_flags). */
#define SOCK_DONE_BIT (1UL << 1)
