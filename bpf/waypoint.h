/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/*
 * How a waypoint learns what a connection is for: the client's side (sockops) notes it under the
 * connection's addresses and ports before the SYN leaves, and cgroup/getsockopt on the waypoint's side
 * answers SO_ORIGINAL_DST from there, once. For a client on another node the note is made when its SYN has
 * come (handoff_option.h). Whoever connects to the waypoint by himself has no note: the
 * waypoint is told nothing, and closes.
 *
 * All instances of a waypoint on a node stand behind one address, its front: sk_lookup gives each new
 * connection to one that listens. One that was killed gets none from that moment on, and who is behind a
 * front is no other node's business.
 */
#pragma once

#include <bpf/bpf_core_read.h>

#include "choose.h"
#include "kernel_types.h"

#define SOL_IP		0
#define SOL_IPV6	41
#define SO_ORIGINAL_DST 80 /* linux/netfilter_ipv4.h; IP6T_SO_ORIGINAL_DST is the same number */

/* As the flow, which the kernel's own answers have no use for. */
#define OUR_ANSWER bpf_htonl(1)

/* struct sockaddr_in6 */
struct original_destination {
	__u16 family;
	__be16 port;
	__be32 flow;
	__be16 prefix; /* enum handoff_prefix */
	__u8 service[4];
	__u8 namespace_id[5];
	__u8 account_id[5];
	__u32 scope;
};

/*
 * What stands for a service's address in the one that a waypoint is told. Of an IPv6 one the upper half of a
 * sum of products (multilinear hashing, strongly universal: Dietzfelbinger): who does not know the secret
 * cannot choose an address with the hash of another one.
 */
static __always_inline __u32 service_word(const struct ip *vip)
{
	__u32 zero = 0;
	const struct service_secret *secret;

	if (ip_is_v4(vip))
		return vip->word[3];
	secret = bpf_map_lookup_elem(&service_secrets, &zero);
	if (!secret)
		return 0;
	return (secret->word[0] + secret->word[1] * vip->word[0] + secret->word[2] * vip->word[1] +
		secret->word[3] * vip->word[2] + secret->word[4] * vip->word[3]) >>
	       32;
}

/* One that changes while it is read is read again, then taken for unknown. */
static __always_inline void note_client(__u64 netns_cookie, struct handoff_value *asked)
{
	struct pod_key key = { .netns_cookie = netns_cookie };
	int attempt;

#pragma unroll
	for (attempt = 0; attempt < READ_ATTEMPTS; attempt++) {
		struct identity_value *value = bpf_map_lookup_elem(&identities, &key);

		if (!value)
			return;
		__builtin_memcpy(asked->client_namespace, value->namespace_id, sizeof(value->namespace_id));
		__builtin_memcpy(asked->client_account, value->account_id, sizeof(value->account_id));
		barrier();
		if (*(volatile __u64 *)&value->netns_cookie == netns_cookie)
			return;
		__builtin_memset(asked->client_namespace, 0, sizeof(asked->client_namespace));
		__builtin_memset(asked->client_account, 0, sizeof(asked->client_account));
	}
}

/* What a connection is for, before its SYN leaves; false: the kernel says too little of it. */
static __always_inline bool ask(struct bpf_sock *sk, const struct socket_state *state,
				struct handoff_value *asked)
{
	struct tcp_sock *tcp = (struct tcp_sock *)bpf_skc_to_tcp_sock(sk);

	if (!tcp)
		return false;
	asked->service = service_word(&state->vip);
	asked->prefix = bpf_htons(ip_is_v4(&state->vip) ? HANDOFF_IPV4 : HANDOFF_IPV6);
	asked->port = state->vip_port;
	asked->sequence = BPF_CORE_READ(tcp, write_seq);
	note_client(state->netns_cookie, asked);
	return true;
}

static __always_inline void note_handoff(const struct handoff_key *key, const struct handoff_value *asked)
{
	if (bpf_map_update_elem(&handoffs, key, asked, BPF_ANY))
		count(REASON_STATE_LOST);
}

static __always_inline bool handoff_key_of(struct bpf_sock *sk, struct handoff_key *key)
{
	if (sk->family == AF_INET) {
		key->waypoint = ip_from_v4(sk->src_ip4);
		key->client = ip_from_v4(sk->dst_ip4);
	} else if (sk->family == AF_INET6) {
		key->waypoint.word[0] = sk->src_ip6[0];
		key->waypoint.word[1] = sk->src_ip6[1];
		key->waypoint.word[2] = sk->src_ip6[2];
		key->waypoint.word[3] = sk->src_ip6[3];
		key->client.word[0] = sk->dst_ip6[0];
		key->client.word[1] = sk->dst_ip6[1];
		key->client.word[2] = sk->dst_ip6[2];
		key->client.word[3] = sk->dst_ip6[3];
	} else {
		return false;
	}
	key->waypoint_port = bpf_htons(sk->src_port);
	key->client_port = sk->dst_port;
	return true;
}

/*
 * Whether a note is of this connection: notes of those that came to nothing stay, and addresses and ports are
 * used again. What was received so far tells where the client began; a FIN counts as one byte more.
 */
static __always_inline bool is_noted(struct bpf_sock *sk, const struct handoff_value *asked)
{
	struct bpf_tcp_sock *tcp = bpf_tcp_sock(sk);
	__u32 began;

	if (!tcp)
		return false;
	began = tcp->rcv_nxt - (__u32)tcp->bytes_received - 1;
	return began == asked->sequence || began == asked->sequence + 1;
}

/* Always told as IPv6, whatever the socket is: Envoy takes it so, and there is room to say who asks. */
SEC("cgroup/getsockopt")
int pykmesh_origdst(struct bpf_sockopt *ctx)
{
	struct original_destination *answer = ctx->optval;
	struct handoff_key key = {};
	struct handoff_value *asked;
	struct bpf_sock *sk = ctx->sk;

	if (ctx->optname != SO_ORIGINAL_DST || (ctx->level != SOL_IP && ctx->level != SOL_IPV6) || !sk)
		return 1;
	if (!handoff_key_of(sk, &key))
		return 1;
	if ((void *)(answer + 1) > ctx->optval_end)
		return 1;
	/* Answered by another release's program, which stands beside for a while. */
	if (!ctx->retval && answer->flow == OUR_ANSWER)
		return 1;
	asked = bpf_map_lookup_elem(&handoffs, &key);
	if (!asked || !is_noted(sk, asked)) {
		count(REASON_HANDOFF_UNKNOWN);
		return 1;
	}
	answer->family = AF_INET6;
	answer->port = asked->port;
	answer->flow = OUR_ANSWER;
	answer->prefix = asked->prefix;
	__builtin_memcpy(answer->service, &asked->service, sizeof(answer->service));
	__builtin_memcpy(answer->namespace_id, asked->client_namespace, sizeof(answer->namespace_id));
	__builtin_memcpy(answer->account_id, asked->client_account, sizeof(answer->account_id));
	answer->scope = 0;
	ctx->optlen = sizeof(*answer);
	barrier(); /* one store for both is refused by the verifier */
	ctx->retval = 0;
	bpf_map_delete_elem(&handoffs, &key);
	return 1;
}

/* Ports come one after the other, or every other one: each bit of the result depends on all. */
static __always_inline __u32 mixed(__u32 bits)
{
	bits = (bits ^ bits >> 16) * 0x7feb352du;
	bits = (bits ^ bits >> 15) * 0x846ca68bu;
	return bits ^ bits >> 16;
}

/*
 * The same instance for the same client's port: what begins with a SYN cookie ends where it began. Without
 * an instance it is as if there were no program.
 */
SEC("sk_lookup")
int pykmesh_front(struct bpf_sk_lookup *ctx)
{
	struct front_key key = { .port = ctx->local_port };
	struct front_value *front;
	__u32 from, count, i;

	if (ctx->protocol != IPPROTO_TCP)
		return SK_PASS;
	/* The kernel reads zero for an address of another family. */
	key.address.word[0] = ctx->local_ip6[0];
	key.address.word[1] = ctx->local_ip6[1];
	key.address.word[2] = ctx->local_ip6[2] | (ctx->family == AF_INET ? bpf_htonl(0xffff) : 0);
	key.address.word[3] = ctx->local_ip6[3] | ctx->local_ip4;
	front = bpf_map_lookup_elem(&fronts, &key);
	if (!front)
		return SK_PASS;
	count = front->count;
	if (!count)
		return SK_PASS;
	from = ctx->remote_ip4 ^ ctx->remote_ip6[0] ^ ctx->remote_ip6[1] ^ ctx->remote_ip6[2] ^
	       ctx->remote_ip6[3];
	from = mixed(from + bpf_ntohs(ctx->remote_port));
	for (i = 0; i < FRONT_INSTANCES_MAX && i < count; i++) {
		__u32 port = front->ports[(from + i) % count & (FRONT_INSTANCES_MAX - 1)];
		struct bpf_sock *listener = bpf_map_lookup_elem(&listeners, &port);
		long refused;

		if (!listener)
			continue;
		refused = bpf_sk_assign(ctx, listener, 0);
		bpf_sk_release(listener);
		if (!refused)
			break;
	}
	return SK_PASS;
}
