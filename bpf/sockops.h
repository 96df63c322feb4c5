/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/* The ends of a connection, as sockops programs read them. */
#pragma once

#include <stddef.h>

#include "mesh_helpers.h"

/* One load at a fixed offset: the verifier refuses a context pointer that the compiler has moved. */
#define CONTEXT(context, field)                                                                              \
	({                                                                                                   \
		__u32 word;                                                                                  \
		asm volatile("%0 = *(u32 *)(%1 + %2)"                                                        \
			     : "=r"(word)                                                                    \
			     : "r"(context), "i"(offsetof(typeof(*context), field)));                        \
		word;                                                                                        \
	})

static __always_inline struct ip sockops_local(struct bpf_sock_ops *ops)
{
	struct ip address;

	if (ops->family == AF_INET)
		return ip_from_v4(CONTEXT(ops, local_ip4));
	address.word[0] = CONTEXT(ops, local_ip6[0]);
	address.word[1] = CONTEXT(ops, local_ip6[1]);
	address.word[2] = CONTEXT(ops, local_ip6[2]);
	address.word[3] = CONTEXT(ops, local_ip6[3]);
	return address;
}

static __always_inline struct ip sockops_remote(struct bpf_sock_ops *ops)
{
	struct ip address;

	if (ops->family == AF_INET)
		return ip_from_v4(CONTEXT(ops, remote_ip4));
	address.word[0] = CONTEXT(ops, remote_ip6[0]);
	address.word[1] = CONTEXT(ops, remote_ip6[1]);
	address.word[2] = CONTEXT(ops, remote_ip6[2]);
	address.word[3] = CONTEXT(ops, remote_ip6[3]);
	return address;
}

/* remote_port is in network order in the upper half of the word on little-endian kernels (net/core/filter.c).
 */
static __always_inline __be16 sockops_remote_port(struct bpf_sock_ops *ops)
{
	return bpf_htons(bpf_ntohl(ops->remote_port));
}
